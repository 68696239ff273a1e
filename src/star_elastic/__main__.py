"""`python -m star_elastic` is the `star-elastic` command."""

from star_elastic.cli import main

main()
