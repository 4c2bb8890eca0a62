"""The pages of ``nbcache help``: one for each topic, written beside this or taken from what the code says of itself."""
