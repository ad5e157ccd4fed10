"""Terms: what licences and providers say about training on a model's outputs, and the gate that decides by them."""
