// Compiles what lies between the two marks for more than the machine at hand, whatever the compiler was told.

#pragma once

#define ANYBIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ANYBIT_TARGET_BEGIN(features) \
    ANYBIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ANYBIT_TARGET_END ANYBIT_PRAGMA(clang attribute pop)
#else
#define ANYBIT_TARGET_BEGIN(features) ANYBIT_PRAGMA(GCC push_options) ANYBIT_PRAGMA(GCC target(features))
#define ANYBIT_TARGET_END ANYBIT_PRAGMA(GCC pop_options)
#endif
