"""Safety preference alignment of vision-language models: the library under the notebooks."""

import logging

# bitsandbytes is optional. The user can do nothing about the warnings that it logs at import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Other libraries import DeepSpeed if it is installed. DeepSpeed then logs that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
