"""Eight CPU devices, and shapes checked in every function of vidgen."""

import jax
import jaxtyping

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("vidgen", "beartype.beartype")
