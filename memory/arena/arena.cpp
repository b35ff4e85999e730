// An allocator that gives every request of a training step the address a plan found for it.
//
// A step of training asks for the same memory in the same order every time. One step is recorded; its blocks are packed
// beforehand (memory/addresses.py); in later steps the n-th request gets the n-th address within one reservation. A
// request that is not the planned one, or whose place is still taken, is served like any other and counted: nothing that
// a step does can make two live blocks overlap.
//
// Everything else (weights, what is made between steps, other streams) is served by best fit over segments, with
// neighbours joined; a hole is used again on the stream it was freed on only, so no synchronization is needed. A block
// that another stream was told of (recordStream) is freed when that stream has come to an end.
//
// torch loads this through CUDAPluggableAllocator. CUDA's runtime is looked up when it is first used, so that the same
// file runs on malloc in tests.

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using Stream = void*;

constexpr size_t kAlign = 512;                // as torch rounds requests on CUDA
constexpr size_t kSmallSegment = 20u << 20;   // segments hold at least so many bytes
constexpr size_t kSegmentRound = 2u << 20;    // and whole pages of the driver
constexpr int kLost = 8;                      // strange requests in a row before the place in the plan is looked for
constexpr size_t kLookAhead = 256;

size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }

// Device memory: CUDA's, or the host's in tests.
struct Backend {
  int (*malloc)(void**, size_t) = nullptr;
  int (*free)(void*) = nullptr;
  int (*wait)(Stream) = nullptr;
  int (*clear_error)() = nullptr;

  static int host_malloc(void** out, size_t size) { return posix_memalign(out, kAlign, size); }
  static int host_free(void* address) {
    std::free(address);
    return 0;
  }

  void use_host() {
    malloc = host_malloc;
    free = host_free;
    wait = [](Stream) { return 0; };
    clear_error = [] { return 0; };
  }

  void use_cuda() {
    void* runtime = nullptr;  // torch has loaded it
    for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so"}) {
      if ((runtime = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) != nullptr) break;
    }
    auto find = [&](const char* name) {
      void* found = runtime != nullptr ? dlsym(runtime, name) : dlsym(RTLD_DEFAULT, name);
      if (found == nullptr) throw std::runtime_error(std::string("CUDA's runtime has no ") + name);
      return found;
    };
    malloc = reinterpret_cast<int (*)(void**, size_t)>(find("cudaMalloc"));
    free = reinterpret_cast<int (*)(void*)>(find("cudaFree"));
    wait = reinterpret_cast<int (*)(Stream)>(find("cudaStreamSynchronize"));
    clear_error = reinterpret_cast<int (*)()>(find("cudaGetLastError"));
  }
};

struct Live {
  size_t bytes;
  Stream stream;
  bool planned;
  int64_t event;  // index among the recorded, or -1
  std::set<Stream> others;
};

struct Hole {
  size_t bytes;
  int segment;
  Stream stream;
};

struct Segment {
  char* base;
  size_t bytes;
};

class Arena {
 public:
  void start(bool cuda) {
    std::lock_guard<std::mutex> hold(lock_);
    cuda ? backend_.use_cuda() : backend_.use_host();
  }

  char* allocate(size_t wanted, Stream stream) {
    std::lock_guard<std::mutex> hold(lock_);
    if (backend_.malloc == nullptr) backend_.use_cuda();
    size_t size = rounded(wanted == 0 ? 1 : wanted, kAlign);
    char* address = in_step_ && stream == stream_ ? by_plan(size) : nullptr;
    bool planned = address != nullptr;
    if (!planned) address = by_fit(size, stream);
    int64_t event = -1;
    if (recording_ && stream == stream_) {
      event = made_++;
      events_.push_back(static_cast<int64_t>(size));
    }
    live_.emplace(address, Live{size, stream, planned, event, {}});
    live_bytes_ += size;
    if (live_bytes_ > peak_live_bytes_) peak_live_bytes_ = live_bytes_;
    return address;
  }

  void release(char* address) {
    std::lock_guard<std::mutex> hold(lock_);
    auto found = live_.find(address);
    if (found == live_.end()) return;
    Live block = std::move(found->second);
    live_.erase(found);
    for (Stream other : block.others) backend_.wait(other);
    live_bytes_ -= block.bytes;
    if (recording_ && block.event >= 0) events_.push_back(-1 - block.event);
    if (block.planned) {
      taken_.erase(address);
    } else {
      put_back(address, block.bytes, block.stream);
    }
  }

  void told(char* address, Stream stream) {
    std::lock_guard<std::mutex> hold(lock_);
    auto found = live_.find(address);
    if (found != live_.end() && found->second.stream != stream) found->second.others.insert(stream);
  }

  void record(bool on, Stream stream) {
    std::lock_guard<std::mutex> hold(lock_);
    if (on) {
      for (auto& entry : live_) entry.second.event = -1;
      events_.clear();
      made_ = 0;
    }
    recording_ = on;
    stream_ = stream;
  }

  void cut() {
    std::lock_guard<std::mutex> hold(lock_);
    if (recording_) events_.push_back(0);
  }

  const std::vector<int64_t>& events() const { return events_; }

  // 0: done; 1: blocks of a plan before are still alive; 2: there is not so much memory
  int plan(const int64_t* sizes, const int64_t* offsets, size_t count, size_t total) {
    std::lock_guard<std::mutex> hold(lock_);
    if (!taken_.empty()) return 1;
    if (base_ != nullptr) {
      backend_.free(base_);
      reserved_bytes_ -= arena_bytes_;
      base_ = nullptr;
    }
    sizes_.assign(sizes, sizes + count);
    offsets_.assign(offsets, offsets + count);
    arena_bytes_ = rounded(total == 0 ? 1 : total, kSegmentRound);
    give_up_segments();
    void* found = nullptr;
    if (backend_.malloc(&found, arena_bytes_) != 0) {
      backend_.clear_error();
      arena_bytes_ = 0;
      sizes_.clear();
      return 2;
    }
    base_ = static_cast<char*>(found);
    reserve(arena_bytes_);
    return 0;
  }

  void step(bool on) {
    std::lock_guard<std::mutex> hold(lock_);
    in_step_ = on && base_ != nullptr;
    next_ = 0;
    strange_ = 0;
  }

  void give_up() {
    std::lock_guard<std::mutex> hold(lock_);
    give_up_segments();
  }

  void statistics(int64_t* out, bool restart) {
    std::lock_guard<std::mutex> hold(lock_);
    const int64_t values[] = {static_cast<int64_t>(live_bytes_), static_cast<int64_t>(peak_live_bytes_),
                              static_cast<int64_t>(reserved_bytes_), static_cast<int64_t>(peak_reserved_bytes_),
                              static_cast<int64_t>(arena_bytes_), on_plan_, off_plan_, occupied_};
    std::memcpy(out, values, sizeof(values));
    if (restart) {
      peak_live_bytes_ = live_bytes_;
      peak_reserved_bytes_ = reserved_bytes_;
      on_plan_ = off_plan_ = occupied_ = 0;
    }
  }

 private:
  char* by_plan(size_t size) {
    if (strange_ >= kLost) {  // something the plan expected was not asked for: go on behind it
      for (size_t at = next_ + 1; at < sizes_.size() && at <= next_ + kLookAhead; ++at) {
        if (sizes_[at] == static_cast<int64_t>(size)) {
          next_ = at;
          break;
        }
      }
      strange_ = 0;
    }
    if (next_ >= sizes_.size() || sizes_[next_] != static_cast<int64_t>(size)) {
      ++strange_;
      ++off_plan_;
      return nullptr;
    }
    strange_ = 0;
    char* address = base_ + offsets_[next_++];
    auto after = taken_.lower_bound(address);
    bool free = after == taken_.end() || address + size <= after->first;
    if (free && after != taken_.begin()) {
      auto before = std::prev(after);
      free = before->first + before->second <= address;
    }
    if (!free) {
      ++occupied_;
      return nullptr;
    }
    ++on_plan_;
    taken_.emplace(address, size);
    return address;
  }

  char* by_fit(size_t size, Stream stream) {
    auto& holes = by_size_[stream];
    auto found = holes.lower_bound({size, nullptr});
    if (found == holes.end()) {
      add_segment(size, stream);
      found = holes.lower_bound({size, nullptr});
    }
    char* address = found->second;
    Hole hole = holes_.at(address);
    drop_hole(address);
    if (hole.bytes > size) add_hole(address + size, {hole.bytes - size, hole.segment, stream});
    segment_of_[address] = hole.segment;
    return address;
  }

  void add_segment(size_t size, Stream stream) {
    size_t bytes = rounded(size < kSmallSegment ? kSmallSegment : size, kSegmentRound);
    void* found = nullptr;
    if (backend_.malloc(&found, bytes) != 0) {
      backend_.clear_error();
      give_up_segments();
      if (backend_.malloc(&found, bytes) != 0) {
        backend_.clear_error();
        throw std::runtime_error("CUDA out of memory: " + std::to_string(bytes) + " bytes wanted, " +
                                 std::to_string(reserved_bytes_) + " reserved, of which " +
                                 std::to_string(live_bytes_) + " in use");
      }
    }
    int index = next_segment_++;
    segments_[index] = {static_cast<char*>(found), bytes};
    reserve(bytes);
    add_hole(static_cast<char*>(found), {bytes, index, stream});
  }

  void put_back(char* address, size_t bytes, Stream stream) {
    Hole hole{bytes, segment_of_.at(address), stream};
    segment_of_.erase(address);
    auto after = holes_.lower_bound(address);
    if (after != holes_.end() && joins(address, hole, after->first, after->second)) {
      hole.bytes += after->second.bytes;
      drop_hole(after->first);
    }
    auto before = holes_.lower_bound(address);
    if (before != holes_.begin()) {
      --before;
      if (joins(before->first, before->second, address, hole)) {
        char* start = before->first;
        hole.bytes += before->second.bytes;
        drop_hole(start);
        address = start;
      }
    }
    add_hole(address, hole);
  }

  static bool joins(char* low, const Hole& first, char* high, const Hole& second) {
    return low + first.bytes == high && first.segment == second.segment && first.stream == second.stream;
  }

  void add_hole(char* address, Hole hole) {
    holes_.emplace(address, hole);
    by_size_[hole.stream].insert({hole.bytes, address});
  }

  void drop_hole(char* address) {
    auto found = holes_.find(address);
    by_size_[found->second.stream].erase({found->second.bytes, address});
    holes_.erase(found);
  }

  void give_up_segments() {
    for (auto at = segments_.begin(); at != segments_.end();) {
      auto hole = holes_.find(at->second.base);
      if (hole == holes_.end() || hole->second.bytes != at->second.bytes) {
        ++at;
        continue;
      }
      drop_hole(at->second.base);
      backend_.free(at->second.base);
      reserved_bytes_ -= at->second.bytes;
      at = segments_.erase(at);
    }
  }

  void reserve(size_t bytes) {
    reserved_bytes_ += bytes;
    if (reserved_bytes_ > peak_reserved_bytes_) peak_reserved_bytes_ = reserved_bytes_;
  }

  std::mutex lock_;
  Backend backend_;
  std::unordered_map<char*, Live> live_;
  std::map<char*, Hole> holes_;
  std::map<Stream, std::set<std::pair<size_t, char*>>> by_size_;
  std::unordered_map<char*, int> segment_of_;
  std::map<int, Segment> segments_;
  int next_segment_ = 0;
  std::map<char*, size_t> taken_;  // of the arena
  char* base_ = nullptr;
  size_t arena_bytes_ = 0;
  std::vector<int64_t> sizes_, offsets_, events_;
  Stream stream_ = nullptr;
  bool recording_ = false, in_step_ = false;
  int64_t made_ = 0, on_plan_ = 0, off_plan_ = 0, occupied_ = 0;
  size_t next_ = 0;
  int strange_ = 0;
  size_t live_bytes_ = 0, peak_live_bytes_ = 0, reserved_bytes_ = 0, peak_reserved_bytes_ = 0;
};

Arena arena;  // one device per process

}  // namespace

extern "C" {

void farspan_start(int cuda) { arena.start(cuda != 0); }

// what torch calls
void* farspan_malloc(ssize_t size, int, void* stream) { return arena.allocate(static_cast<size_t>(size), stream); }
void farspan_free(void* address, ssize_t, int, void*) { arena.release(static_cast<char*>(address)); }
void farspan_record_stream(void* address, void* stream) { arena.told(static_cast<char*>(address), stream); }

// what Python calls
void* farspan_try_malloc(ssize_t size, void* stream) {
  try {
    return arena.allocate(static_cast<size_t>(size), stream);
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}
void farspan_record(int on, void* stream) { arena.record(on != 0, stream); }
void farspan_cut() { arena.cut(); }
size_t farspan_events(int64_t* out, size_t room) {
  const auto& events = arena.events();
  if (out != nullptr) std::memcpy(out, events.data(), sizeof(int64_t) * (room < events.size() ? room : events.size()));
  return events.size();
}
int farspan_plan(const int64_t* sizes, const int64_t* offsets, size_t count, size_t total) {
  return arena.plan(sizes, offsets, count, total);
}
void farspan_step(int on) { arena.step(on != 0); }
void farspan_give_up() { arena.give_up(); }
void farspan_statistics(int64_t* out, int restart) { arena.statistics(out, restart != 0); }
}
