from lora_fuse.cli import main

main()
