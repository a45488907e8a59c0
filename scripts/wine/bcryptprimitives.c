/* Stands in for the bcryptprimitives.dll of Windows, which Rust's standard library takes random
 * numbers from, where Wine is older than 9.0 and has none. For tests alone. */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE data, SIZE_T bytes) {
  return RtlGenRandom(data, (ULONG)bytes);
}
