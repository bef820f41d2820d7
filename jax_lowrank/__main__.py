"""`python -m jax_lowrank` is `jax-lowrank`."""

import sys

from jax_lowrank.cli import main

sys.exit(main())
