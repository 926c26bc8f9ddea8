"""One file of tables a family. Facts only: key names, operations, cuts, stages."""
