def draw(data, path):
    pass
