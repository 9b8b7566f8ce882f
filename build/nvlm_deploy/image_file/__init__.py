"""Read image files safely: judge them from their headers, then decode nothing but the parts that make pixels.

Every format has a module that finds those parts in a bounded number of steps. Pillow gets a file rebuilt from them
alone, so metadata can neither cost time nor decide whether sound pixels are served.
"""
