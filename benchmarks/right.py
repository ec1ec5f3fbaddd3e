from planted import Right
RIGHT: tuple[Right, ...] = ()
