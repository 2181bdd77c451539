"""Pictures and videos as bytes, as uint8 tensors, and as sheets to look at.

`images` and `video` decode and encode, `sheets` arranges for the eye. Tensors here are uint8
[0, 255] RGB with channels before rows: ``(3, h, w)`` and ``(f, 3, h, w)``; `images.to_float` and
`images.to_uint8` lead to and from the floats in [-1, 1] of the rest of the package.
"""
