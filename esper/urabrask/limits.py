"""Numbers that judge: what counts as steady, as faster, and what a gauntlet may use."""

from typing import Final

STEADY: Final = 0.05
"""Largest spread of identical runs that counts as steady, relative; beyond it a kernel is tagged `noisy`."""

GAIN: Final = 0.05
"""Share of the eager module's time by which a compiled kernel must be faster."""

CPU_S: Final = 240.0
"""Processor time of the gauntlet of a small kernel, in seconds; about 15 are usual."""

SMALL: Final = 2**24
"""Largest `tokens * d_in * d_out` of a small kernel; the time of a larger one grows with it."""

LONGEST: Final = 16.0
"""Most times that a large kernel may take what a small one may."""

WALL_FACTOR: Final = 4.0
"""Time on the clock over processor time; at idle priority the clock runs while others work."""

MEMORY_MB: Final = 4096
"""Memory of one gauntlet, in MiB; about 400 are usual."""
