//! One encrypted object as one FUSE file.
