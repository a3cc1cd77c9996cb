"""Running graphs: the reference interpreter, its schedule, and inputs given or made up."""
