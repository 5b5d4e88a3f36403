"""Let the tests run on a bare checkout, as they do on an install."""

from pathlib import Path

import podsim

podsim.__path__.append(str(Path(__file__).parent))  # podsim.kernels is ./kernels, and so on
