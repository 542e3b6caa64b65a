"""What several recipes share. Nothing here can be run."""
