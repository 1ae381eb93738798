"""Starting the ranks: which hosts there are, which launcher is installed, and the command that it needs."""
