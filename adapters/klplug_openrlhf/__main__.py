from klplug_openrlhf.launcher import main

main()
