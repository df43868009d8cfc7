"""Safety preference alignment of vision-language models: the library under the notebooks."""

import logging

# Said at import, of an optional package, where a reader can do nothing about it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# DeepSpeed, which other libraries import where it is installed, announces that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
