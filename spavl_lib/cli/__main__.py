"""`python -m spavl_lib.cli` is the command `spavl`."""

from spavl_lib.cli import main

main()
