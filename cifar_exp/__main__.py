from cifar_exp.cli.main import main

main()
