"""What training and protoeval share in reporting: frames as files, tables and charts."""
