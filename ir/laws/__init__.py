"""Laws that every operator record is held to, on drawn cases: element maps, gradients, scales, ATen."""
