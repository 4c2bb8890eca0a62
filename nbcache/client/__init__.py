"""The client: a kernel's side. Describes files, asks the daemon, maps what it is granted."""
