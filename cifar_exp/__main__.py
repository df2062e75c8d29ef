from cifar_exp.main import main

main()
