"""`python -m podsim` is the `podsim` command."""

from podsim.cli import main

main()
