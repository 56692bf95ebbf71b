"""What a program needs and a reader of the paper does not: files, processes, conventions, speed."""
