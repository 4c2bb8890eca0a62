"""``python -m nbcache.daemon``: see :func:`nbcache.daemon.lifecycle.main`."""

from nbcache.daemon.lifecycle import main

main()
