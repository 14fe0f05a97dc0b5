// Probe is what the integration tests run in their containers. It writes what it sees
// there to report.json in the service's bind directory.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	volume = "/vol" // of some images

	renameExchange = 2 // RENAME_EXCHANGE of renameat2(2)
)

var sysRenameat2 = map[string]uintptr{"amd64": 316, "arm64": 276}[runtime.GOARCH]

// report is what the tests read; machine_test.go has its twin.
type report struct {
	Args, Env, Interfaces []string
	UID, GID              int
	Dir, Hostname         string
	Terminal              bool
	Status                string            // /proc/self/status
	Cgroup                map[string]string // limits, by the kernel's file name
	Files                 map[string]string // under the bind directory: owner, mode and content
	Starts                string            // a byte for each start that the volume has seen
	Stdin                 string            // its first line, or "EOF"
	Forks                 int               // that worked
}

func main() {
	// Tests give the bind directory as the second argument.
	mode, dir := os.Args[1], os.Args[2]
	switch mode {
	case "run":
		must(os.WriteFile(filepath.Join(dir, "from-container"), []byte("written inside"), 0o644))
		listen()
		write(dir, look(dir))
		wait()
	case "stdin":
		seen := look(dir)
		line, err := bufio.NewReader(os.Stdin).ReadString('\n')
		if seen.Stdin = line; err == io.EOF {
			seen.Stdin = "EOF"
		}
		write(dir, seen)
	case "forks":
		seen := look(dir)
		seen.Forks = forks()
		write(dir, seen)
	case "stubborn":
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		write(dir, look(dir))
		<-term
		must(os.WriteFile(filepath.Join(dir, "terminated"), nil, 0o644))
		for range term {
		}
	case "hog":
		for hoard := [][]byte{}; ; {
			chunk := make([]byte, 1<<20)
			for i := 0; i < len(chunk); i += os.Getpagesize() {
				chunk[i] = 1
			}
			hoard = append(hoard, chunk)
		}
	case "nest":
		must(os.Chdir(dir))
		levels, err := strconv.Atoi(os.Args[3])
		must(err)
		for range levels {
			must(os.Mkdir("d", 0o755))
			must(os.Chdir("d"))
		}
	case "swap":
		swap(dir, os.Args[3])
	case "shell":
		shell()
	case "record":
		rawTerminal()
		to, err := os.OpenFile(filepath.Join(dir, "stdin"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		must(err)
		fmt.Println("ready")
		_, err = io.Copy(to, os.Stdin)
		must(err)
	case "deaf":
		rawTerminal() // a tty that edits lines drops what is too long for one
		fmt.Println("ready")
		wait()
	case "both":
		for i := range 500 {
			fmt.Fprintf(os.Stdout, "out %d\n", i)
			fmt.Fprintf(os.Stderr, "err %d\n", i)
		}
		fmt.Print("the end of out")
		fmt.Fprint(os.Stderr, "the end of err")
		wait()
	}
}

// shell obeys the lines on its stdin, and prints the size of its tty when that changes.
func shell() {
	sizes := make(chan os.Signal, 100)
	signal.Notify(sizes, syscall.SIGWINCH)
	go func() {
		for range sizes {
			var size struct{ rows, cols, x, y uint16 }
			ioctl(0, syscall.TIOCGWINSZ, unsafe.Pointer(&size))
			fmt.Printf("size %dx%d\n", size.rows, size.cols)
		}
	}()
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch word, rest, _ := strings.Cut(lines.Text(), " "); word {
		case "say":
			fmt.Printf("<%s>\n", rest)
		case "prompt":
			fmt.Print("$ ")
		case "exit":
			return
		}
	}
}

// rawTerminal has a tty, if stdin is one, pass every byte on as it is.
func rawTerminal() {
	var settings syscall.Termios
	if !ioctl(0, syscall.TCGETS, unsafe.Pointer(&settings)) {
		return
	}
	settings.Iflag, settings.Oflag, settings.Lflag = 0, 0, 0
	settings.Cc[syscall.VMIN], settings.Cc[syscall.VTIME] = 1, 0
	if !ioctl(0, syscall.TCSETS, unsafe.Pointer(&settings)) {
		panic("cannot set the tty")
	}
}

func ioctl(fd, request uintptr, to unsafe.Pointer) bool {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(to))
	return errno == 0
}

func look(dir string) (r report) {
	r.Args, r.Env, r.UID, r.GID = os.Args, os.Environ(), os.Getuid(), os.Getgid()
	r.Dir, _ = os.Getwd()
	r.Hostname, _ = os.Hostname()
	r.Terminal = isTerminal(0) && isTerminal(1) && isTerminal(2)
	links, _ := net.Interfaces()
	for _, link := range links {
		r.Interfaces = append(r.Interfaces, link.Name)
	}
	status, _ := os.ReadFile("/proc/self/status")
	r.Status = string(status)
	r.Cgroup = map[string]string{}
	for _, name := range []string{"cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us", "memory/memory.limit_in_bytes",
		"memory/memory.memsw.limit_in_bytes", "pids/pids.max", "cpu.max", "memory.max", "memory.swap.max", "pids.max"} {
		if text, err := os.ReadFile("/sys/fs/cgroup/" + name); err == nil {
			r.Cgroup[filepath.Base(name)] = string(text)
		}
	}
	r.Files = map[string]string{}
	must(filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		var text []byte
		if info.Mode().IsRegular() {
			text, err = os.ReadFile(path)
		}
		name, _ := filepath.Rel(dir, path)
		r.Files[name] = fmt.Sprintf("%d:%d %v %s", owner.Uid, owner.Gid, info.Mode(), text)
		return err
	}))
	if starts, err := os.OpenFile(volume+"/starts", os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644); err == nil {
		fmt.Fprint(starts, "x")
		text, _ := os.ReadFile(starts.Name())
		r.Starts = string(text)
	}
	return r
}

// write puts the report in place whole, so that a reader never sees a part of it.
func write(dir string, r report) {
	text, err := json.Marshal(r)
	must(err)
	must(os.WriteFile(filepath.Join(dir, ".report"), text, 0o644))
	must(os.Rename(filepath.Join(dir, ".report"), filepath.Join(dir, "report.json")))
}

func isTerminal(fd uintptr) bool {
	var settings [128]byte
	return ioctl(fd, syscall.TCGETS, unsafe.Pointer(&settings))
}

// listen answers lines on TCP port 8080 and datagrams on UDP port 8081.
func listen() {
	tcp, err := net.Listen("tcp", ":8080")
	must(err)
	go func() {
		for {
			conn, err := tcp.Accept()
			must(err)
			line, _ := bufio.NewReader(conn).ReadString('\n')
			fmt.Fprint(conn, "tcp ", line)
			conn.Close()
		}
	}()
	udp, err := net.ListenPacket("udp", ":8081")
	must(err)
	go func() {
		buffer := make([]byte, 512)
		for {
			n, from, err := udp.ReadFrom(buffer)
			must(err)
			udp.WriteTo(append([]byte("udp "), buffer[:n]...), from)
		}
	}()
}

func wait() {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	<-term
}

// forks counts how often it can fork, up to a thousand. It uses bare system calls: at
// the limit, the Go runtime could not even make a thread.
func forks() (n int) {
	var children [1000]uintptr
	for n < len(children) {
		pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			break
		}
		if pid == 0 {
			for {
				syscall.RawSyscall6(syscall.SYS_PSELECT6, 0, 0, 0, 0, 0, 0) // for ever
			}
		}
		children[n] = pid
		n++
	}
	for _, pid := range children[:n] {
		syscall.RawSyscall(syscall.SYS_KILL, pid, uintptr(syscall.SIGKILL), 0)
		syscall.RawSyscall6(syscall.SYS_WAIT4, pid, 0, 0, 0, 0, 0)
	}
	return n
}

// swap exchanges directories in dir, full of files, with symbolic links to target, for ever.
func swap(dir, target string) {
	must(os.MkdirAll(dir+"/top/sub", 0o755))
	for i := range 50 {
		must(os.WriteFile(fmt.Sprintf("%s/top/sub/f%d", dir, i), []byte("bait"), 0o644))
	}
	must(os.Symlink(target, dir+"/toplink"))
	if !filepath.IsAbs(target) {
		target = "../" + target
	}
	must(os.Symlink(target, dir+"/top/link"))
	write(dir, report{})
	for {
		exchange(dir+"/top/sub", dir+"/top/link")
		exchange(dir+"/top", dir+"/toplink")
	}
}

// exchange fails now and then, where a part of the path is just a link.
func exchange(a, b string) {
	from, err := syscall.BytePtrFromString(a)
	must(err)
	to, err := syscall.BytePtrFromString(b)
	must(err)
	here := -100 // AT_FDCWD
	syscall.Syscall6(sysRenameat2, uintptr(here), uintptr(unsafe.Pointer(from)), uintptr(here),
		uintptr(unsafe.Pointer(to)), renameExchange, 0)
}

func must(err error) {
	if err != nil && !errors.Is(err, net.ErrClosed) {
		panic(err)
	}
}
