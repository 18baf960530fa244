"""`python -m embdiff.cli`, which is what `accelerate launch -m embdiff.cli` runs."""

from embdiff.cli import main

main()
