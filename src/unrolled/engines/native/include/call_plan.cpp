// Runs a call plan: checks that a call is the one that was recorded, creates the results and launches the kernels.
// launches.py and native_replay.py describe the plan. Functions of Python and torch are passed in as addresses, so
// this needs neither their headers nor their libraries to be built. Every function is called with the GIL held.
#include "platform.h"
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using Object = void;  // a PyObject
using Tensor = void;  // an at::Tensor, which lies inside of its PyObject

// The functions of Python and torch, and the constants; native_replay.py has the same list.
struct Interface {
  Object* (*call)(Object* callable);                        // PyObject_CallNoArgs
  Object* (*item)(Object* dict, Object* key);               // PyDict_GetItemWithError, a borrowed reference
  Object* (*tuple_item)(Object* tuple, ptrdiff_t);          // PyTuple_GetItem, a borrowed reference
  ptrdiff_t (*tuple_size)(Object* tuple);                   // PyTuple_Size
  Object* (*new_tuple)(ptrdiff_t);                          // PyTuple_New
  int (*set_tuple_item)(Object*, ptrdiff_t, Object*);       // PyTuple_SetItem, which steals the reference
  void (*increment)(Object*);                               // Py_IncRef
  void (*decrement)(Object*);                               // Py_DecRef, which accepts null
  Object* (*no_memory)();                                   // PyErr_NoMemory
  void (*clear_error)();                                    // PyErr_Clear
  void* (*release)();                                       // PyEval_SaveThread
  void (*acquire)(void*);                                   // PyEval_RestoreThread
  void* (*address)(Object*);                                // PyLong_AsVoidPtr
  int32_t (*sizes)(Tensor*, int64_t**);                     // aoti_torch_get_sizes
  int32_t (*strides)(Tensor*, int64_t**);                   // aoti_torch_get_strides
  int32_t (*dimensions)(Tensor*, int64_t*);                 // aoti_torch_get_dim
  int32_t (*dtype)(Tensor*, int32_t*);                      // aoti_torch_get_dtype
  int32_t (*data)(Tensor*, void**);                         // aoti_torch_get_data_ptr
  int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor**);  // .._empty_strided
  int32_t (*forget)(Tensor*);                               // aoti_torch_delete_tensor_object
  bool (*records_gradients)();                              // aoti_torch_grad_mode_is_enabled
  Object* (*wrap)(const Tensor*);                           // THPVariable_Wrap
  Object* none;
  Object* tuple_type;
  Object* tensor_type;
  Object* parameter_type;
  int64_t tensor_offset;       // of the tensor in its PyObject, in bytes
  int64_t keys_offset;         // of the set of dispatch keys in what the tensor points to
  uint64_t keys, inference_keys;  // the set of a tensor in the CPU's memory, outside and inside of inference mode
  int64_t low_address;         // lower addresses aren't accepted
};

static Interface python;

EXPORT void set_interface(const Interface* given) { python = *given; }

constexpr int MAX_SLOTS = 128, MAX_NUMBERS = 1024, MAX_DIMENSIONS = 8;
constexpr int64_t STACK_MEMORY = 32768;  // bytes of scratch memory that lie on the stack

enum LaunchKind : int64_t { KERNEL, BULK, COPY, ZEROS };

// Reads the numbers of a plan one after another.
struct Reader {
  const int64_t* next;
  int64_t number() { return *next++; }
  Object* object() { return (Object*)*next++; }
  const int64_t* list(int64_t& count) {
    count = *next++;
    const int64_t* first = next;
    next += count;
    return first;
  }
};

static bool is_type(Object* object, Object* type) { return ((Object**)object)[1] == type; }

// Reads the shape of a tensor from the plan, and whether an object is such a tensor; then *address is its address.
static bool read_tensor(Reader& plan, int32_t dtype, Object* object, char** address) {
  int64_t count, dimensions, *sizes, *strides, expected = 1;
  const int64_t* shape = plan.list(count);
  if (!object || (!is_type(object, python.tensor_type) && !is_type(object, python.parameter_type))) return false;
  Tensor* tensor = (char*)object + python.tensor_offset;
  char* implementation = *(char**)tensor;
  uint64_t keys;
  memcpy(&keys, implementation + python.keys_offset, sizeof keys);
  if (keys != python.keys && keys != python.inference_keys) return false;
  int32_t actual;
  if (python.dimensions(tensor, &dimensions) || dimensions != count || python.dtype(tensor, &actual) || actual != dtype)
    return false;
  if (python.sizes(tensor, &sizes) || python.strides(tensor, &strides)) return false;
  for (int64_t k = count - 1; k >= 0; k--) {
    if (sizes[k] != shape[k] || (strides[k] != expected && sizes[k] != 1)) return false;
    expected *= sizes[k];
  }
  return !python.data(tensor, (void**)address) && (int64_t)*address > python.low_address;
}

// Creates a tensor with the shape that comes next in the plan. Null: there is no memory.
static Object* new_tensor(Reader& plan, int32_t dtype, char** address) {
  int64_t count, strides[MAX_DIMENSIONS], stride = 1;
  const int64_t* shape = plan.list(count);
  for (int64_t k = count - 1; k >= 0; k--) strides[k] = stride, stride *= shape[k];
  Tensor* tensor;
  if (python.empty(count, shape, strides, dtype, 0, 0, &tensor)) return nullptr;
  Object* object = python.data(tensor, (void**)address) ? nullptr : python.wrap(tensor);
  python.forget(tensor);
  return object;
}

// Runs the launches that come next in the plan. False: there is no memory.
static bool launch(Reader& plan, char** slots, int64_t slot_count) {
  int64_t scratch = plan.number(), launches = plan.number();
  alignas(64) char stack[STACK_MEMORY];
  char *memory = nullptr, *room = stack;
  if (scratch > STACK_MEMORY) {
    memory = (char*)malloc(scratch + 64);
    if (!memory) return false;
    room = memory + (64 - (uintptr_t)memory % 64);
  }
  slots[slot_count] = room;
  bool done = true;
  int64_t numbers[MAX_NUMBERS];
  while (launches-- && done) {
    int64_t kind = plan.number(), function = plan.number(), argument = plan.number(), threads = plan.number();
    int64_t count, places;
    const int64_t* given = plan.list(count);
    memcpy(numbers, given, 8 * count);
    const int64_t* place = plan.list(places);
    for (int64_t k = 0; k < places; k += 3)
      numbers[place[k]] = place[k + 1] ? (int64_t)(slots[place[k + 1]] + place[k + 2]) : 0;
    switch (kind) {
      case KERNEL: done = ((bool (*)(const void*, const void*))function)((const void*)argument, numbers); break;
      case BULK: done = !((int (*)(const void*, int64_t, int))function)(numbers, argument, (int)threads); break;
      case COPY: memcpy((void*)numbers[0], (const void*)numbers[1], argument); break;
      default: memset((void*)numbers[0], 0, argument);
    }
  }
  free(memory);
  return done;
}

static Object* no_result() {
  python.clear_error();
  python.increment(python.none);
  return python.none;
}

// Creates the results that come next in the plan, and runs its launches. If that fails, *failure is what to return:
// None if torch has no memory for a result, so that its own error is raised, and null, with an error, for a kernel.
static bool run(Reader& plan, int32_t dtype, char** slots, int64_t slot_count, Object** results, int64_t count,
                Object** failure) {
  int64_t created = 0;
  while (created < count) {
    results[created] = new_tensor(plan, dtype, &slots[slot_count]);
    if (!results[created]) break;
    created++, slot_count++;
  }
  bool done = false;
  if (created == count) {
    void* thread = python.release();
    done = launch(plan, slots, slot_count);
    python.acquire(thread);
  }
  if (done) return true;
  *failure = created < count ? no_result() : python.no_memory();
  while (created--) python.decrement(results[created]);
  return false;
}

static Object* tuple_of(Object** objects, int64_t count) {  // steals the references
  Object* tuple = python.new_tuple(count);
  for (int64_t k = 0; k < count; k++) {
    if (tuple)
      python.set_tuple_item(tuple, k, objects[k]);
    else
      python.decrement(objects[k]);
  }
  return tuple;
}

// Whether functions return, and dictionaries contain, the objects that the plan says.
static bool conditions_hold(Reader& plan, Object* attributes) {
  for (int64_t count = plan.number(); count--;) {
    Object *function = plan.object(), *expected = plan.object(), *result = python.call(function);
    if (!result) python.clear_error();
    python.decrement(result);
    if (result != expected) return false;
  }
  for (int64_t count = plan.number(); count--;) {
    Object *dictionary = plan.object(), *key = plan.object(), *expected = plan.object();
    if (python.item(dictionary ? dictionary : attributes, key) != expected) return false;
  }
  return true;
}

// infer(attributes of the module, x, state): the result of a call that records no gradients, or None if the plan is
// not for this call.
EXPORT Object* infer(Object* self, Object* const* arguments, ptrdiff_t) {
  Reader plan{(const int64_t*)python.address(self)};
  Object *attributes = arguments[0], *x = arguments[1], *state = arguments[2], *results[MAX_SLOTS];
  char* slots[MAX_SLOTS];
  int64_t slot = 0, name_count;
  if (python.records_gradients() || !conditions_hold(plan, attributes)) return no_result();
  Object* parameters = python.item(attributes, plan.object());
  int32_t dtype = (int32_t)plan.number();
  slots[slot++] = nullptr;
  if (!parameters || !read_tensor(plan, dtype, x, &slots[slot++])) return no_result();
  int64_t given = plan.number(), states = plan.number();
  if (!given && state != python.none) return no_result();
  if (given > 1 && (!is_type(state, python.tuple_type) || python.tuple_size(state) != given)) return no_result();
  for (int64_t k = 0; k < given; k++)
    if (!read_tensor(plan, dtype, given > 1 ? python.tuple_item(state, k) : state, &slots[slot++])) return no_result();
  const int64_t* names = plan.list(name_count);
  for (int64_t k = 0; k < name_count; k++)
    if (!read_tensor(plan, dtype, python.item(parameters, (Object*)names[k]), &slots[slot++])) return no_result();
  int64_t count = plan.number();
  Object* failure;
  if (!run(plan, dtype, slots, slot, results, count, &failure)) return failure;
  Object** final = results + (count - states);
  Object* final_state = states > 1 ? tuple_of(final, states) : *final;
  if (count == states || !final_state) return final_state;
  Object* both[] = {results[0], final_state};
  return tuple_of(both, 2);
}

// replay(tensors...): the results of a part of a call in a tuple, or None if the plan is not for these tensors. The
// tensor None stands for no tensor.
EXPORT Object* replay(Object* self, Object* const* arguments, ptrdiff_t given) {
  Reader plan{(const int64_t*)python.address(self)};
  Object* results[MAX_SLOTS];
  char* slots[MAX_SLOTS];
  int64_t slot = 0, inputs = plan.number();
  int32_t dtype = (int32_t)plan.number();
  if (inputs != given) return no_result();
  slots[slot++] = nullptr;
  for (int64_t k = 0; k < inputs; k++)
    if (!read_tensor(plan, dtype, arguments[k], &slots[slot++])) return no_result();
  int64_t count = plan.number();
  Object* failure;
  if (!run(plan, dtype, slots, slot, results, count, &failure)) return failure;
  return tuple_of(results, count);
}
