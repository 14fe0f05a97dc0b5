// Ogen takes one service through its whole life, with the client that ogen makes of docs/openapi.json:
// ogen URL KEY ARCHIVE ID, the third of a root file system with the program hello.
package main

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"clients/ogen/api"
)

type key string

func (k key) CoreKey(context.Context, api.OperationName) (api.CoreKey, error) {
	return api.CoreKey{APIKey: string(k)}, nil
}

// want returns an answer if it is of the type T.
func want[T any](answer any, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	wanted, ok := answer.(T)
	if !ok {
		log.Fatalf("the answer is %T %+v", answer, answer)
	}
	return wanted
}

func main() {
	ctx, id := context.Background(), os.Args[4]
	archive, err := os.ReadFile(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	c, err := api.NewClient(os.Args[1], key(os.Args[2]))
	if err != nil {
		log.Fatal(err)
	}
	want[*api.HealthNoContent](c.Health(ctx))
	want[*api.Machine](c.Machine(ctx))
	image := want[*api.Image](c.ImportImage(ctx, api.ImportImageReq{Data: bytes.NewReader(archive)}))
	fmt.Println(image.ImageID)
	params := api.ServiceParams{ID: id, Image: image.ImageID, BindDir: "/data", Cmd: []string{"/hello"}, Env: []string{"GREETING=Hello"},
		Tty: api.NewOptBool(false), MaxRAM: api.NewOptInt64(64 << 20),
		PortMap:    api.NewOptServiceParamsPortMap(api.ServiceParamsPortMap{"80/tcp": api.NewHostMapEntryHostMapEntries(api.HostMapEntry{HostPort: "0"})}),
		StopSignal: api.NewOptStopSignal(api.NewIntStopSignal(15))}
	create := &api.CreateService{Type: api.CreateServiceTypeRaw, Params: params}
	want[*api.CreateServiceCreated](c.CreateService(ctx, create, api.CreateServiceParams{}))
	want[*api.RemoveImageConflict](c.RemoveImage(ctx, api.RemoveImageParams{Image: image.ImageID}))
	want[*api.CreateServiceConflict](c.CreateService(ctx, create, api.CreateServiceParams{}))
	control := func(op api.ControlOp) {
		want[*api.ControlServiceNoContent](c.ControlService(ctx, &api.Control{Op: op}, api.ControlServiceParams{ID: id}))
	}
	control(api.ControlOpStart)
	if len(*want[*api.ListServicesOKApplicationJSON](c.ListServices(ctx))) != 1 {
		log.Fatal("the list has not one service")
	}
	if !want[*api.Container](c.InspectService(ctx, api.InspectServiceParams{ID: id})).State.Running {
		log.Fatal("it does not run")
	}
	want[*api.Stats](c.ServiceStats(ctx, api.ServiceStatsParams{ID: id}))
	want[*api.ResizeServiceTTYConflict](c.ResizeServiceTTY(ctx, &api.TTYSize{Rows: 24, Cols: 80}, api.ResizeServiceTTYParams{ID: id}))
	want[*api.WriteServiceStdinNoContent](c.WriteServiceStdin(ctx, api.WriteServiceStdinReq{Data: strings.NewReader("ogen\n")},
		api.WriteServiceStdinParams{ID: id}))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		logs := want[*api.ServiceLogsOK](c.ServiceLogs(ctx, api.ServiceLogsParams{ID: id, Tail: api.NewOptString("1")}))
		var text bytes.Buffer
		_, err := text.ReadFrom(logs)
		if err == nil && text.String() == "Hello, ogen\n" {
			break
		}
		if err != nil || time.Now().After(deadline) {
			log.Fatalf("the logs are %q, %v", text.String(), err)
		}
	}
	control(api.ControlOpStop)
	want[*api.SetServiceEnvNoContent](c.SetServiceEnv(ctx, api.Env{"GREETING": "Good evening"}, api.SetServiceEnvParams{ID: id}))
	control(api.ControlOpRestart)
	control(api.ControlOpKill)
	want[*api.DeleteServiceNoContent](c.DeleteService(ctx, api.DeleteServiceParams{ID: id}))
	gone := want[*api.InspectServiceNotFound](c.InspectService(ctx, api.InspectServiceParams{ID: id}))
	if kind := gone.Error.Kind; kind != api.FailureKindNoSuchService {
		log.Fatalf("it is gone, and the error is of the kind %s", kind)
	}
	want[*api.ListImagesOKApplicationJSON](c.ListImages(ctx))
	want[*api.RemoveImageNoContent](c.RemoveImage(ctx, api.RemoveImageParams{Image: image.ImageID}))
}
