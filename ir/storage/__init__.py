"""Where the data of weights is, and the layouts that hold it."""
