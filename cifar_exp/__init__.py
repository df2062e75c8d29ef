from cifar_exp.host import refuse_windows

refuse_windows()  # before anything else of the package is imported, whose modules need what Windows lacks
