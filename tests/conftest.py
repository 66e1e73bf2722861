"""Eight CPU devices, and shapes checked in every function of vidgen."""

import os

# Before jax looks for devices: the TPU compiler would look for TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("vidgen", "beartype.beartype")
