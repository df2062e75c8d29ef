from cifar_exp.cli.entry import main

main()
