"""``python -m nbcache`` is ``nbcache``."""

from nbcache.cli import main

main()
