// q, k and v are read in words of 16 bytes.

alias Word = vec4<u32>;
