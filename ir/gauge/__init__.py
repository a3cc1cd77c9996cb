"""What may be done to a Dim with the function unchanged: gauge classes, maps, and the frames that share one."""
