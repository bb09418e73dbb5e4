"""The experiments around the method: run configs, data, backbones, training, records."""

import logging

# It says at import that a kernel for 4-bit layers is missing, in every process anew; nothing here has such layers.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
