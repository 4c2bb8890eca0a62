"""``nbcache doctor``: what of this machine nbcache can use, what it cannot, and what to do about it."""
