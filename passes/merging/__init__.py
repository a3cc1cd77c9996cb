"""Several trained networks of one architecture as one, and parts of different networks joined."""
