"""What `apply_to` needs: finding the layers of a live module that a changed graph belongs to."""
