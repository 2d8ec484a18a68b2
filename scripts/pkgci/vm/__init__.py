"""Virtual machines: image, snapshot, restored machine, and the proxy that confines them."""
