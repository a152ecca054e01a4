"""`python -m gr2`."""

from gr2.cli import main

main()
