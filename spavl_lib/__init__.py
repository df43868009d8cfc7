"""Safety preference alignment of vision-language models: the library under the notebooks."""

import logging

# Said at import, of an optional package, where a reader can do nothing about it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
