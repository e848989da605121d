from specforge.testing.golden.run import main

main()
