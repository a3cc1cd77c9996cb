"""A removed block's weights, fused into those of its neighbours."""
