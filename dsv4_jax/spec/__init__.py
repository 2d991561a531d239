"""What a model is: kinds of layers, geometry, configs, rotary embedding."""
