"""Starting the ranks: on which hosts, with which launcher, and by which command."""
