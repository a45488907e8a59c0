//! The suite of `varlen-fa`: its programs are test targets of this package.
