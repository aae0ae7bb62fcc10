"""Pictures of parts: placed on the canvas that the models know, drawn as sketches, gathered in sets."""
